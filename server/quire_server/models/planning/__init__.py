"""What a model is and consists of, known before any tensor is read: specs, names, parts, layouts, bytes. No torch.

Read by kinds and families, by the loader, and by whoever counts memory, the download Job included.
"""
