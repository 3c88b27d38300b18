"""The database: how it is reached, how sessions stay brief, and what the tables are."""
