"""What is heard of the cluster and kept: kopf's handlers, the store, discovery, and what pods answer when asked.

Owns `Observed`, all that is known of one LLMDeployment at one moment. Decides nothing and writes nothing. May import
`spec`.
"""
