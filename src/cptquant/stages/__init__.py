"""One function per arrow of the main path, each leaving a file from which the next can start.

A stage looks at the digests of everything it depends on; if its file stands with the same digests it is not run
again. So a killed run goes on where it stopped, and changing one choice repeats only what depends on it.
"""
