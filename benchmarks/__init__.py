"""Scripts that measure; see README.md. A package, since others install one of this name."""
