"""The Job that brings a model into its volume, and what its pods get. May import what the room around it holds."""
