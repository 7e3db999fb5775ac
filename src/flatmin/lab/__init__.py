"""The laboratory: does any of it help on your problem, and what does it cost?"""
