"""Chat models that word questions about users; `instructue_feast.user_qa.proposals` says what they are asked."""
