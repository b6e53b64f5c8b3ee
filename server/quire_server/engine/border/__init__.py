"""Between the API process and the engine: what crosses, both ends of the bridge, and the verdict on whether it holds.

May import the engine's requests, outputs and core; nothing of the engine imports from here.
"""
