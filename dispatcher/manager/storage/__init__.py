"""The database: schema and one module for each kind of row."""
