"""flatmin inside trainers that people have; each is imported by its path, and needs the trainer's own package."""
