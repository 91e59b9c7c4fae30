"""Raw data to records."""
