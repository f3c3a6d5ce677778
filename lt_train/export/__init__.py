"""One folder that holds the whole hybrid: weights, configs, tokenizer, code, model card; checked before it is called done."""
