"""The medicine of the embedded world: easily confused conditions and the findings that tell them apart. No jax.

Every finding belongs to one condition, holds two adjacent content words or a number with its unit, contains no other
finding and no word of a condition's name, so that citing a finding is never mistaken for naming the answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """A diagnosis: its name as an option, the cluster it is confused within, who has it, and what gives it away.

    `ages` are years, both ends included; `women` is the share of women among patients.
    """

    name: str
    cluster: str
    ages: tuple[int, int]
    women: float
    findings: tuple[str, ...]


# fmt: off
_TABLE = (
    Condition("gout", "joints", (40, 79), 0.2, (
        "white ear tophi", "urate 9.8 mg/dL", "needle crystals",
        "swollen big toe", "thiazide pills", "heavy beer use")),
    Condition("pseudogout", "joints", (60, 88), 0.5, (
        "rhomboid crystals", "positive birefringence", "calcified knee meniscus",
        "magnesium 0.9 mg/dL", "parathyroid surgery", "calcified wrist disc")),
    Condition("septic arthritis", "joints", (20, 80), 0.45, (
        "purulent joint fluid", "gram positive cocci", "fever 39.4 °C",
        "joint glucose 12 mg/dL", "recent knee injection", "injected drugs")),
    Condition("rheumatoid arthritis", "joints", (30, 65), 0.75, (
        "swollen hand joints", "anti-CCP antibodies", "morning stiffness",
        "ulnar drift", "swan neck joints", "elbow nodules")),
    Condition("Graves disease", "glands", (20, 50), 0.8, (
        "bulging eyes", "TSH 0.01 mU/L", "thyroid bruit", "shin myxedema", "heat intolerance", "fine hand tremor")),
    Condition("Hashimoto thyroiditis", "glands", (30, 60), 0.85, (
        "TSH 48 mU/L", "anti-TPO antibodies", "cold intolerance",
        "slow ankle reflexes", "firm goiter", "thin eyebrows")),
    Condition("Addison disease", "glands", (25, 60), 0.6, (
        "dark palm creases", "salt craving", "potassium 6.1 mmol/L",
        "cortisol 2 µg/dL", "sodium 124 mmol/L", "calcified adrenals")),
    Condition("Cushing syndrome", "glands", (25, 55), 0.7, (
        "purple striae", "moon face", "dorsal fat pad", "weak thigh muscles", "easy bruising", "high night cortisol")),
    Condition("appendicitis", "abdomen", (12, 40), 0.45, (
        "McBurney point pain", "psoas sign", "Rovsing sign",
        "early navel pain", "large fecalith", "hip rotation pain")),
    Condition("cholecystitis", "abdomen", (35, 75), 0.65, (
        "Murphy sign", "thick gallbladder wall", "impacted gallstone",
        "right shoulder pain", "fatty meal pain", "blocked cystic duct")),
    Condition("pancreatitis", "abdomen", (30, 70), 0.4, (
        "lipase 1840 U/L", "boring back pain", "flank bruising", "recent ERCP", "alcohol binge", "calcium 7.2 mg/dL")),
    Condition("diverticulitis", "abdomen", (50, 85), 0.5, (
        "left iliac pain", "thick sigmoid wall", "pericolic abscess",
        "colon pouches", "low fiber diet", "bladder fistula")),
    Condition("pulmonary embolism", "chest", (25, 80), 0.5, (
        "swollen left calf", "D-dimer 9 mg/L", "recent long flight",
        "right heart strain", "lung perfusion defect", "leg vein clot")),
    Condition("myocardial infarction", "chest", (45, 85), 0.35, (
        "crushing chest pain", "troponin 6.4 ng/mL", "left arm pain",
        "new Q waves", "inferior ST elevation", "blocked coronary artery")),
    Condition("pericarditis", "chest", (20, 60), 0.35, (
        "friction rub", "relief leaning forward", "PR depression",
        "diffuse ST elevation", "recent viral illness", "pain lying flat")),
    Condition("aortic dissection", "chest", (40, 80), 0.35, (
        "tearing back pain", "unequal arm pulses", "wide mediastinum",
        "intimal flap", "marfanoid build", "diastolic murmur")),
    Condition("multiple sclerosis", "nerves", (20, 45), 0.75, (
        "optic neuritis", "white matter plaques", "oligoclonal bands",
        "Lhermitte sign", "internuclear palsy", "heat blurred vision")),
    Condition("Guillain-Barre syndrome", "nerves", (18, 70), 0.45, (
        "ascending weakness", "absent ankle reflexes", "recent bloody diarrhea",
        "CSF protein 180 mg/dL", "slow nerve conduction", "double facial palsy")),
    Condition("myasthenia gravis", "nerves", (20, 75), 0.55, (
        "fatigable ptosis", "evening double vision", "AChR antibodies",
        "thymus mass", "ice pack relief", "decremental response")),
    Condition("ALS", "nerves", (45, 75), 0.4, (
        "tongue twitching", "wasted hand muscles", "muscle denervation",
        "brisk jaw jerk", "SOD1 mutation", "painless foot drop")),
    Condition("iron deficiency", "blood", (18, 75), 0.7, (
        "ferritin 6 ng/mL", "spoon nails", "ice craving", "pencil cells", "black stools", "high transferrin")),
    Condition("pernicious anemia", "blood", (50, 85), 0.6, (
        "numb tingling feet", "MCV 124 fL", "lost vibration sense",
        "intrinsic factor antibodies", "smooth red tongue", "vitamin B12 90 pg/mL")),
    Condition("beta thalassemia", "blood", (12, 40), 0.5, (
        "hemoglobin A2 6%", "target cells", "frontal bossing",
        "Greek parents", "childhood transfusions", "Mentzer index 10")),
    Condition("spherocytosis", "blood", (12, 45), 0.5, (
        "osmotic fragility", "MCHC 38 g/dL", "negative Coombs test",
        "pigment gallstones", "family splenectomy", "dense round cells")),
)
# fmt: on

CONDITIONS: Mapping[str, Condition] = {condition.name: condition for condition in _TABLE}
FINDINGS: Mapping[str, tuple[str, ...]] = {condition.name: condition.findings for condition in _TABLE}

# Facts that fit anyone: they name no organ of the clusters and no common symptom.
# fmt: off
DISTRACTORS: tuple[str, ...] = (
    "mild seasonal allergies", "an old ankle sprain", "two pet cats", "flat feet", "reading glasses",
    "an old tattoo", "a desk job", "old acne scars", "mild dandruff", "color blindness", "weekly yoga", "bitten nails",
    "a recent dental visit", "a healthy twin", "daily vitamin C", "poor sleep lately", "a small birthmark",
    "pierced ears", "daily green tea", "two older sisters",
)
# fmt: on
