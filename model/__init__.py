"""Language models and how to run them: tensors in, tensors out. Knows no HTTP, no key store, no FAISS."""
