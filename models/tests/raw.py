"""Tiny data sets in the file formats of their publishers, byte for byte."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

N_GENRES = 19


def write(folder: Path, name: str, content: str, encoding: str = "utf-8") -> Path:
    """Writes one file, gzipped if its name ends in .gz, and returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = content.encode(encoding)
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return folder


def json_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def u_item_line(movie_id: int, title: str, genres: list[int]) -> str:
    flags = ["1" if genre in genres else "0" for genre in range(N_GENRES)]
    return "|".join([str(movie_id), title, "01-Jan-1995", "", "http://imdb.com/?a=b", *flags]) + "\n"


def movielens_100k(folder: Path) -> Path:
    write(folder, "u.data", "196\t2\t3\t881250949\n22\t10\t1\t878887116\n196\t1\t5\t881250949\n")
    movies = [(1, "Cité des enfants perdus, La (1995)", [1, 15]), (2, "unknown", [0]), (10, "Heat (1995)", [8])]
    return write(folder, "u.item", "".join(u_item_line(*movie) for movie in movies), "latin-1")


def movielens_1m(folder: Path, with_timestamps: bool = True, encoding: str = "latin-1") -> Path:
    rows = [("1", "10", "5", "978300760"), ("2", "1", "3", "978298413"), ("1", "2", "4", "978300760")]
    width = 4 if with_timestamps else 3
    write(folder, "ratings.dat", "".join("::".join(row[:width]) + "\n" for row in rows))
    movies = "1::Misérables, Les (1995)::Drama|Musical\n2::Face::Off (1997)::Action\n10::Up (2009)::Comedy\n"
    return write(folder, "movies.dat", movies, encoding)


def amazon_2018(folder: Path, suffix: str = ".json.gz") -> Path:
    reviews = [
        {"overall": 5.0, "reviewerID": "A2", "asin": "B01", "unixReviewTime": 1500, "reviewText": 'fine\n"x"'},
        {"overall": 2.0, "reviewerID": "A1", "asin": "B02", "unixReviewTime": 1400},
        {"overall": 1.0, "reviewerID": "A1", "asin": "B99", "unixReviewTime": 1450},
        {"overall": 4.0, "reviewerID": "A1", "asin": "B01", "unixReviewTime": 1300},
    ]
    meta = [
        {"asin": "B01", "title": "Envy Earrings", "category": ["Jewelry", "Earrings"], "brand": "Envy",
         "price": "$9.90", "feature": ["Returns", "Gift box"]},
        {"asin": "B02", "title": "Plain ring", "category": [], "brand": "", "price": ".a-box-inner{color:red}"},
        {"asin": "B01", "title": "Envy Earrings, once more"},
        {"asin": "B03", "title": "Nobody reviewed it"},
        {"asin": "B99", "title": "", "category": [], "brand": ""},
    ]  # fmt: skip
    write(folder, f"Jewelry_5{suffix}", json_lines(reviews))
    return write(folder, f"meta_Jewelry{suffix}", json_lines(meta))


def amazon_2023(folder: Path, suffix: str = ".jsonl") -> Path:
    reviews = [
        {"rating": 5.0, "user_id": "U1", "asin": "V2", "parent_asin": "P2", "timestamp": 1588687728923},
        {"rating": 3.0, "user_id": "U1", "asin": "V1", "parent_asin": "P1", "timestamp": 1588687728922},
    ]
    meta = [
        {"parent_asin": "P2", "title": "Lamp", "main_category": "Home", "categories": [], "store": "Lux",
         "price": 12.5, "features": ["Warm light"]},
        {"parent_asin": "P1", "title": "Cup", "main_category": "Home", "categories": ["Kitchen", "Cups"],
         "store": None, "price": None, "features": []},
    ]  # fmt: skip
    write(folder, f"Home{suffix}", json_lines(reviews))
    return write(folder, f"meta_Home{suffix}", json_lines(meta))
