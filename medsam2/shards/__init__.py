"""WebDataset shards of cases: schema, index, preparation and inspection."""
