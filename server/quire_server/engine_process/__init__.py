"""The engine process, and how a configuration becomes an engine that can step (for `offline` too).

May import `runner`, `engine` and what they import; neither the API process's rooms nor HTTP.
"""
