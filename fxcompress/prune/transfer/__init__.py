"""How channels flow through each operator and layer: one function per kind, found through `registry`."""
