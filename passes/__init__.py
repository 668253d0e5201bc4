"""The library of rewrites: one mechanism a file. Imported as `memcompile.passes`, never by its bare name."""

if __name__ != "memcompile.passes":
    raise ImportError("import memcompile.passes, not passes: the folder is installed inside memcompile")
