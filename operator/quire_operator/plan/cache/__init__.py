"""How a model gets into its volume, and out again: claims, download Jobs, their pods, what nobody uses. Pure."""
