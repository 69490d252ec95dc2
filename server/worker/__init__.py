"""`libration worker`: learns what servers send through Redis. No torch and no weights anywhere in here."""
