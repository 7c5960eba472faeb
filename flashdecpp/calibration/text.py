"""The default text of `flashdecpp calibrate`: short passages of many kinds, written for it."""

TEXT = """\
The lighthouse keeper had counted ships for thirty-one years, and in all that time no two evenings had been
alike. Some nights the fog came in so thick that the lamp lit nothing but itself; on others the sea lay flat
as a plate and he could hear, far below, the fishermen talking about the price of herring. He wrote everything
down. "Nobody will ever read it," his sister said when she visited in spring. "That is not what it is for," he
answered, and went on sharpening his pencil.

## How to change a bicycle tyre

1. Turn the bicycle upside down and take the wheel out.
2. Let out the rest of the air, then lift one side of the tyre over the rim with two levers.
3. Pull out the inner tube, find the hole, roughen the rubber around it, and glue on a patch.
4. Wait five minutes. Put everything back in the reverse order; pump to 4.5 bar (65 psi).

Question: A train leaves at 14:35 and arrives at 17:10. How long does the journey take?
Answer: From 14:35 to 17:10 there are 2 hours and 35 minutes, that is 155 minutes in all.

```python
def moving_average(values: list[float], width: int) -> list[float]:
    if width < 1:
        raise ValueError(f"width must be positive, got {width}")
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + width] - sums[i]) / width for i in range(len(values) - width + 1)]
```

{"id": 20417, "name": "rain gauge", "readings": [0.0, 1.25, 13.7, -1], "active": true, "site": null}

Photosynthesis turns light into chemical energy. In the leaves, chlorophyll absorbs mostly red and blue light;
the energy splits water into oxygen, protons and electrons, and carbon dioxide is bound into sugar. Roughly
half of the oxygen in the air comes from the sea, where tiny algae do the same work as the forests on land.

Der alte Bahnhof steht seit Jahren leer, aber an Sonntagen öffnet dort ein kleines Café. Man trinkt Kaffee aus
dicken Tassen und schaut auf die Gleise, auf denen kein Zug mehr fährt. Au printemps, les enfants du village y
font du vélo ; en hiver, la neige couvre tout et l'on n'entend plus que le vent. El domingo que viene habrá
música, si no llueve.

User: Hi! Could you explain what a hash table is, in simple words?
Assistant: Of course. Imagine a wall of numbered drawers. To put something away, you compute a number from its
name and use the drawer with that number. To find it again you compute the same number, so you never have to
search the whole wall. If two names give the same number, both share a drawer, and you look at each of them.
User: And when the drawers get full?
Assistant: Then you build a bigger wall, and move everything once.

| city   | people    | founded |
|--------|-----------|---------|
| Harwik | 48,210    | 1162    |
| Ostrel | 1,305,900 | 987     |
| Nimm   | 912       | 1874    |

no no no no no no no no, he said, no no no no no no.

Let f(x) = 3x^2 - 12x + 7. Its derivative is f'(x) = 6x - 12, which is zero at x = 2; since f''(x) = 6 > 0,
the function has its minimum there, and f(2) = 12 - 24 + 7 = -5.

From: Ines Calder <ines@example.org>
Subject: Re: keys for the workshop
Thanks for the quick reply! I'll pick them up on Thursday at about 9:30, unless the ferry is late again. Do
you still need the ladder? It's 3 metres long, so we would have to tie it to the roof... Best wishes, I.

The committee considered the proposal in detail. Although its cost exceeds the estimate of the previous year
by eleven per cent, the majority held that a further delay would be more expensive than the work itself, and
that the bridge, which carries the only road to the northern villages, cannot be closed in winter. The
decision was therefore taken to begin in April, to finish before the first frost, and to report every month.
"""
