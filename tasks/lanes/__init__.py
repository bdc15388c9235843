"""Workers side by side: Prefect's task runners, one lane for each device."""
