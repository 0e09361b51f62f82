"""Making a layer: source -> entries and payloads -> compiled stages -> sink."""
