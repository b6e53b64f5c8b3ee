"""The API process from its command line to its end: arguments, the HTTP server's life, the loading of the model.

May import every room but `engine_process`, `runner`, `models` and `offline`: it never loads torch.
"""
