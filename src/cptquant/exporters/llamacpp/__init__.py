"""llama.cpp in a process of its own, to see what it makes of an exported file."""
