"""From a question to its answers: fanned out to the engine, read as one stream, parsed into messages.

Every door uses this room: OpenAI's endpoints today, other dialects, gRPC and offline batches later. It may import the
frontend and what lies below; it knows no HTTP, no schemas, and none of those who use it.
"""
