"""A server with a page: one engine, a queue of videos, the shape of OpenAI's video API. Needs the extra ``server``."""
