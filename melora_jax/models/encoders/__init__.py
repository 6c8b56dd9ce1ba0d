"""BERT, RoBERTa, XLM-R and DistilBERT with their heads; imports `nn`, `core` and what models share."""
