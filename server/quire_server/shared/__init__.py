"""What all processes of the server speak: configuration, errors, parameters of requests, logs, the machine's limits.

Imports no other room.
"""
