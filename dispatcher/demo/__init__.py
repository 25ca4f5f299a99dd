"""The demo app: a small notebook for one user, an example of a single-user web application.

It depends on two conventions only: it can listen on a Unix socket, and the header `X-Dispatcher-User` contains the
name of its user.
"""
