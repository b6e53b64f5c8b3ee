"""The Kubernetes API as Quire's processes speak it: what objects are called, what is asked, and who asks.

Objects are plain JSON. `objects` and `times` are pure data that any room may import; `api` says what can be asked and
how it can fail; `connection` and `client` do it. Knows no kind by name, and no meaning of any object.
"""
