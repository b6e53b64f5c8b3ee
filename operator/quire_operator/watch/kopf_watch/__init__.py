"""kopf's part: its handlers, its session, what its watches show of life, and the tasks that it starts.

The only room that knows kopf; what it hears goes into `watch.store`.
"""
