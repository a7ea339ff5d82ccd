"""How Airflow reaches us: coordinator, activation, provider info and command line."""
