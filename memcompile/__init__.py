"""memcompile: a declarative compiler that rewrites transformers into memory-efficient equivalents."""
