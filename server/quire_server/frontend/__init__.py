"""What every door of the API process shares: requests to the engine, its ids turned into text, and the metrics.

Knows no HTTP. May import `engine.border`, `tokens` and `shared`.
"""
