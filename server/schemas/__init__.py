"""What may come in, field by field. The only place besides the settings that knows pydantic."""
