"""Files of rows: JSONL and parquet, in our form or verl's."""
