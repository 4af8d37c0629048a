// Each reader's counts of a JUnit file, and ctrf's own judgement of a CTRF file, as one line of JSON.
// Arguments: the folder in which they are installed, the two files.
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

const [folder, junit, report] = process.argv.slice(2)
const installed = createRequire(pathToFileURL(`${folder}/`))
const load = name => import(pathToFileURL(installed.resolve(name)))
const { parse } = await load('junit2json')
const { convertJUnitToCTRFReport } = await load('junit-to-ctrf')
const { default: results } = await load('test-results-parser')
const ctrf = await load('ctrf')
const xml = readFileSync(junit, 'utf8')
const found = {}

const cases = (await parse(xml)).testsuite.flatMap(suite => suite.testcase ?? [])
found.junit2json = {
  tests: cases.length,
  failed: cases.filter(each => each.failure || each.error).length,
  skipped: cases.filter(each => each.skipped).length,
}

// Its totals take the document's attributes and leave out the skips, so its cases are counted.
const read = results.parse({ type: 'junit', files: [junit] }).suites.flatMap(suite => suite.cases)
const having = status => read.filter(each => each.status === status).length
found['test-results-parser'] = { tests: read.length, failed: having('FAIL'), skipped: having('SKIP') }

const { summary } = (await convertJUnitToCTRFReport(junit)).results
found['junit-to-ctrf'] = { tests: summary.tests, failed: summary.failed, skipped: summary.skipped }

const verdict = ctrf.validate(JSON.parse(readFileSync(report, 'utf8')))
found.ctrf = { valid: verdict.valid, errors: (verdict.errors ?? []).map(error => error.message) }
console.log(JSON.stringify(found))
