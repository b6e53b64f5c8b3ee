"""Bodies, in and out: read within bounds and leniently, weighed before they are decoded, written in pieces.

Knows no endpoint. Imported by `openai` and `answering`.
"""
