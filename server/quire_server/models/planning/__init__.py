"""What a model consists of, known before any tensor is read: parts, layouts, methods, a rank's share, bytes. No torch.

May import the vocabulary beside it (`spec`, `weight_map`); read by kinds and families, by the loader, and by whoever
counts memory, the download Job included.
"""
