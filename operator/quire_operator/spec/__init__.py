"""The object, read and judged: the LLMDeployment as frozen dataclasses, schema and rules, and the settings around it.

Owns what a person may write, and every `SpecError` with the path of its field; and `kinds`, by which all rooms name
objects. Imports no other room.
"""
