"""The demo app: a small notebook for one person, an example of a single-user web application.

It depends on two conventions only: it can listen on a Unix socket, and the header `X-Dispatcher-User` names the
person that it serves.
"""
