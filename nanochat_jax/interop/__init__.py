"""Weights and vocabularies in and out: nanochat's PyTorch files, and Hugging Face directories.
Foreign names and layouts live here and nowhere else.
"""
