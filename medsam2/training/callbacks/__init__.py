"""What Lightning calls while a run goes on: validation, tables, pictures."""
