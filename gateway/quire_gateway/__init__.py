"""The request-holding router: finds the model, holds the request while the model is cold, picks a replica.

backends.py   what the gateway is told: which models there are, and which replicas answer (a Protocol; static here)
routing.py    Host or `model` → model
demand.py     per model: waiting, in flight, lease; what scaling reads
holding.py    the bounded queue in front of a cold model
proxy.py      one request to one replica, retried elsewhere before the first byte
app.py        the ASGI application
config.py     the file of a gateway that watches no cluster
__main__.py   the gateway as a process of its own
errors.py     every answer that the gateway itself gives, in OpenAI's shape
"""
