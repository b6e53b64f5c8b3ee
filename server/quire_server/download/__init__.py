"""Fetching a model's files into a volume: `quire download`, the program of the download Job.

Nothing here loads torch, and each library that speaks to a kind of source is loaded when a URI of that kind is met.
"""
