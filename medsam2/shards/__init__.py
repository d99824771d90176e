"""`Case` -> WebDataset shards: schema, preparation, split, index, inspection."""
