"""The demo app: a small notebook for one person, as a stranger's single-user web application would be.

It knows nothing of the dispatcher but two conventions: it may listen on a Unix socket, and whoever stands before
it says in `X-Dispatcher-User` whom it serves.  Standard library and httptools only, so that it starts at once.
"""
