"""What crosses process borders, and nothing else.

Names, ports, probe paths, labels, metric names, the termination message, model URIs and memory-fit arithmetic.
Imported by the operator, the gateway, the server and the command line; imports none of them, nor torch, nor a
Kubernetes client. Change a value here and every process changes with it.
"""
