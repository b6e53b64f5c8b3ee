"""`LLM`: batch inference inside the caller's own process, with no server. Imported by nobody here."""
