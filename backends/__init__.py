"""The targets: one folder a target. Imported as `memcompile.backends`, never by its bare name."""

if __name__ != "memcompile.backends":
    raise ImportError("import memcompile.backends, not backends: the folder is installed inside memcompile")
