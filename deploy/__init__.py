"""What surrounds the daemon where it is deployed: boards, rules, supervisors. Not part of the wheel."""
