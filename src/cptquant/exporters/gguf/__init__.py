"""GGUF files that llama.cpp opens: tensors, metadata, tokenizer, the writer, and the check of what was written."""
